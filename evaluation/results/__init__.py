"""Results of the evaluation: records, statistics, tables and figures."""
