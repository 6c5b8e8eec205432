"""One paper, one file: its docstring, its blocks, one builder, and `VARIANTS`, a row for each network of the paper."""
