"""Pictures as inline SVG, one file each; every one draws itself for a page and, narrower, for a phone."""

WIDE, NARROW = 720, 360  # px
