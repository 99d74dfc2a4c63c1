"""Storage: one `Store` for a local folder, S3 and GCS, and stages of Parquet parts published by manifest. No Ray."""
