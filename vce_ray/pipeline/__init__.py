"""Pipeline: runs from a concept's name to a report, one or many, on Ray."""
