"""What tyro says of wrong usage, as one line."""

import re

from classfair import _names


def first_section(box: str) -> str:
    """tyro frames its errors and adds advice below a rule: keep the message, as one line.

    On a terminal the title is part of the frame, elsewhere it is a section of its own.
    """
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)  # colours
    framed = "─" in box
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│╭╮╰╯|+ ")
        if text and set(text) <= {"─", "-"}:
            sections.append([])
        elif text and "─" not in text:
            sections[-1].append(text)
    written = [section for section in sections if section]
    message = written[0] if framed or len(written) == 1 else written[1]
    return f"{' '.join(message)} (see classfair {_names.command} --help)"
