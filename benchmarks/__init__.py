"""Speed against the stock implementations, measured by one harness."""
