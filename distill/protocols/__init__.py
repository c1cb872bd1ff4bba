"""Score features by protocol: features of images, tasks from k-NN to depth, closeness to a teacher."""
