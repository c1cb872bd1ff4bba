"""Files of weights in and out: layouts of other libraries, export, model cards."""
