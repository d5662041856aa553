"""The frozen base model behind a small interface, its cache and its attention."""
