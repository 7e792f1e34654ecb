"""Parts of the command line that find out what a model needs."""
