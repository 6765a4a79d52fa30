"""Questions to persons. ``queue`` keeps those of one sandbox; ``waiting`` is what a person is shown of them."""
