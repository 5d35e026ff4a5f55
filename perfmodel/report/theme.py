"""Colours and type of pictures and pages: readable in print, in the dark, and by colour-blind eyes.

Hues are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which stay apart under every common colour blindness; each
has a tone for light and one for dark ground. No colour says what words or position do not say too.
"""

import re

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'

PALETTE = {  # name -> (on light ground, on dark ground)
    "ground": ("#ffffff", "#15181c"),
    "panel": ("#f6f7f8", "#1d2126"),
    "ink": ("#1c2126", "#e7eaed"),
    "muted": ("#5d6771", "#9aa5b0"),
    "rule": ("#d9dee3", "#343b43"),
    "grid": ("#e9ecef", "#2a3037"),
    "total": ("#4b5661", "#aab4be"),
    "saved": ("#0072b2", "#56b4e9"),
    "added": ("#d55e00", "#f0894a"),
    "blue": ("#0072b2", "#56b4e9"),
    "sky": ("#56b4e9", "#8fd0f5"),
    "green": ("#009e73", "#2fc79a"),
    "orange": ("#e69f00", "#f2b632"),
    "red": ("#d55e00", "#f0894a"),
    "purple": ("#b0578d", "#d99bc0"),
    "grey": ("#8a949e", "#7f8a95"),
    "yes": ("#00734f", "#2fc79a"),
    "no": ("#b34700", "#f0894a"),
}

TONES = (0.18, 0.32, 0.48, 0.62)  # opacities of a map's cells, on which text stays readable

CHARTS = (  # classes that the pictures use
    f".chart text{{font-family:{FONT};font-size:13px;fill:var(--ink);font-variant-numeric:tabular-nums}}"
    ".chart text.muted{fill:var(--muted);font-size:12px}"
    ".chart text.strong{font-weight:600}"
    ".chart .grid{stroke:var(--grid);stroke-width:1;fill:none}"
    ".chart .rule{stroke:var(--rule);stroke-width:1;fill:none}"
    ".chart .leader{stroke:var(--muted);stroke-width:1;fill:none}"
    ".chart text{pointer-events:none}"  # what lies below says more on hovering
    ".chart .cell:hover{stroke:var(--ink);stroke-width:2}"
    ".chart .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}"
    ".chart .dashed{stroke-dasharray:2 5}"
    ".chart .halo{paint-order:stroke;stroke:var(--ground);stroke-width:4px;stroke-linejoin:round}"
    + "".join(f".chart .f-{name}{{fill:var(--{name})}}.chart .s-{name}{{stroke:var(--{name})}}" for name in PALETTE)
    + ".chart .here{fill:none;stroke:var(--ink);stroke-width:2.5}"
    + "".join(f".chart .tone-{level}{{fill-opacity:{opacity}}}" for level, opacity in enumerate(TONES, start=1))
    + ".chart .bubble{fill-opacity:.55;stroke-opacity:.9;stroke-width:1}"
)


def variables(dark: bool = False) -> str:
    """The palette as CSS custom properties."""
    return "".join(f"--{name}:{tones[dark]};" for name, tones in PALETTE.items())


def charts_on_light_ground() -> str:
    """The classes of the pictures with plain colours, for viewers that know no custom properties."""
    return re.sub(r"var\(--([a-z]+)\)", lambda match: PALETTE[match[1]][0], CHARTS)
