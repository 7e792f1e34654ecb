"""Parts of the command line that are about serving engines."""
