"""Write a finished network, with its card and the licence of its teacher; export it for other libraries and read it back."""
