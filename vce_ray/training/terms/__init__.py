"""Loss terms that objectives combine, in plain torch: preference and divergence from the frozen base."""
