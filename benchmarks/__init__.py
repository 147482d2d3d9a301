"""Load generator and measurements. Each script prints tables for people and one line of JSON last."""
