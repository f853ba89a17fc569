"""Names the culprit: rules and probes over everything known of a training, and one verdict."""
