"""What the tests drive: the API server through kubectl, the chart, a hub and a load inside the cluster."""
