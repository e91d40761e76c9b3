"""A curve or a table of shares as an SVG picture, which any browser shows: no package is needed to draw it."""

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 360, 60, 44  # pixels


def curve(points: Sequence[tuple[float, float]], title: str, x_name: str, y_name: str) -> str:
    """points: two or more (x, y), x ascending from above 0; the x axis is logarithmic."""
    x_low, x_high = math.log2(points[0][0]), math.log2(points[-1][0])
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    room = (y_high - y_low or 1.0) * 0.05
    y_low, y_high = y_low - room, y_high + room

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - x_low) / (x_high - x_low or 1.0)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - 20), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - 40)

    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(x, y) for x, y in points))
    marks = []
    for power in range(math.ceil(x_low), math.floor(x_high) + 1, max(1, round((x_high - x_low) / 8))):
        a, _ = at(2.0**power, y_low)
        marks.append(_text(a, HEIGHT - BOTTOM + 16, f"{2**power:,}", "middle"))
    for part in range(5):
        y = y_low + (y_high - y_low) * part / 4
        _, b = at(points[0][0], y)
        marks.append(
            f'<path d="M{LEFT} {b:.1f}H{WIDTH - 20}" stroke="#ddd"/>' + _text(LEFT - 6, b + 4, f"{y:.2f}", "end")
        )
    drawn = f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="2"/>'
    names = f"{_text(LEFT, 24, title)}{_text(WIDTH / 2, HEIGHT - 8, x_name, 'middle')}{_text(6, 36, y_name)}"
    return _page("".join(marks) + drawn + names)


def heat(table: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], title: str) -> str:
    """Shares from 0, white, to 1, blue, each written into its field."""
    width, height = (WIDTH - LEFT - 20) / len(columns), (HEIGHT - BOTTOM - 40) / len(rows)
    drawn = [_text(LEFT, 24, title)]
    for y, (name, shares) in enumerate(zip(rows, table, strict=True)):
        top = 40 + y * height
        drawn.append(_text(LEFT - 6, top + height / 2 + 4, name, "end"))
        for x, share in enumerate(shares):
            a = LEFT + x * width
            field = f'x="{a:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
            drawn.append(f'<rect {field} fill="#06c" fill-opacity="{share:.3f}" stroke="#ddd"/>')
            drawn.append(_text(a + width / 2, top + height / 2 + 4, f"{share:.0%}", "middle"))
    for x, name in enumerate(columns):
        drawn.append(_text(LEFT + (x + 0.5) * width, HEIGHT - BOTTOM + 16, name, "middle"))
    return _page("".join(drawn))


def _page(drawn: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{drawn}</svg>\n'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
