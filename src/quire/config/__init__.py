"""Configuration: defined once (`args`), resolved once (`resolve`), never written (`schema`)."""
