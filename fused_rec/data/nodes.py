"""Node types that every graph has."""

USER, ITEM = "user", "item"
