"""BIDS trees: finding scans, reading `participants.tsv`, and writing manifests of questions."""
