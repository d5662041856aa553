"""Draw the picture of the README: the demo's own output, as the terminal shows it.

python recipes/picture.py docs/demo.svg
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console

from hydraspec.cli.demo import show_demo


def main(file: Path) -> None:
    console = Console(highlight=False, record=True, width=92, force_terminal=True)
    show_demo(console, tree=None, max_new_tokens=64, rounds=3, json=None)
    picture = console.export_svg(title="make demo")
    # The fonts would be fetched from elsewhere; any monospaced one will do.
    file.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
