"""How many tokens a chunk has when a context is read."""

DEFAULT_CHUNK_TOKENS = 2048
QUERY_CHUNKS = 4  # a chunk of queries is so many times longer: attention kernels are best at 8192 and more


def chunk_length(tokens: int) -> int:
    """The default number of tokens in a chunk; 0 (whole) for a context of at most two chunks."""
    return DEFAULT_CHUNK_TOKENS if tokens > 2 * DEFAULT_CHUNK_TOKENS else 0
