"""Where host and device bytes live: buffers, accounting, and the facts of this machine."""
