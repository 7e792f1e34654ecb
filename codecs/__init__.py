"""What a code is: how vectors become pages and come back."""
