"""The service under load: throughput, overload, fairness, soak, and costs."""
