"""Storage, independent of Ray: a `Store` on local disk, S3 or GCS, and stages of Parquet parts with a manifest."""
