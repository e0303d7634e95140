"""What `batchsd new-plugin` copies, a folder a kind: whole plugins called `mine`, whose tests pass as they stand."""
