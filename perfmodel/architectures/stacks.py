"""Rows of blocks in a module tree, counted through: where a block lives, and what lives in which block."""

Stacks = tuple[tuple[str, int], ...]  # paths of rows of blocks, with how many there are in each (`Architecture.stacks`)


def block_path(stacks: Stacks, layer: int) -> str:
    """The path of a block: of T5's 12 + 12 the block 13 is `decoder.block.1`."""
    for path, count in stacks:
        if layer < count:
            return f"{path}.{layer}"
        layer -= count
    raise IndexError(layer)


def block_of(stacks: Stacks, path: str) -> tuple[int | None, str]:
    """The block that a path leads into and the rest of the path; None and the whole path outside of blocks."""
    before = 0
    for row, count in stacks:
        number, _, name = path.removeprefix(f"{row}.").partition(".")
        if path.startswith(f"{row}.") and number.isdigit():
            return before + int(number), name
        before += count
    return None, path
