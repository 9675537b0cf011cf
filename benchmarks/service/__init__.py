"""The service under load: throughput, overload, fairness, soak, what it costs."""
