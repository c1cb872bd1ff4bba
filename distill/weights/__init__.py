"""Files of weights in and out: layouts of other libraries, what a file is, model cards."""
