"""Files of weights: layouts of other libraries, what a file is, which networks it holds."""
