"""The built-in demo cohort."""
