"""What is known of a model's keys before it is attached: maps by measuring, static scales."""
