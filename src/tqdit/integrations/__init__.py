"""The integrations of tqdit in other libraries."""
