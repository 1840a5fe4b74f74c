"""The recommendation model: propagation over the graph, text fusion, scores and losses."""
