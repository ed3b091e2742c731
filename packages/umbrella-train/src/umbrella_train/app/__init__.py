"""A local web page to ask a trained model about scans (`umbrella-app`, needs the extra `umbrella-train[app]`)."""
