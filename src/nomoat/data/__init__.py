"""Data sets: files of any known format -> rows -> tokens with loss weights -> packed micro-batches."""
