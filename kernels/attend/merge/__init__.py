"""The last launch: partial sums over packed and over 16-bit tokens become the output."""
