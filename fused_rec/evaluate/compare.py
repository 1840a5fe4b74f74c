"""Models side by side."""

from collections.abc import Mapping, Sequence


def table(rows: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> str:
    """Aligned columns, one row a model."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>12}" for name in metrics)]
    for model, values in rows.items():
        lines.append(f"{model:<{width}}" + "".join(f"{values[name]:12.4f}" for name in metrics))
    return "\n".join(lines)
