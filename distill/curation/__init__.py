"""From a heap of pictures to a training set."""
