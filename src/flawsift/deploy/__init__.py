"""From a model to a production line: exported graphs, and what runs them."""
