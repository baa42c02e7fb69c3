"""From pictures to boxes: reading, preparing, predicting, results, drawing, videos."""
