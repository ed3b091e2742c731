"""From a BIDS tree and its tables of participants to manifests."""
