"""Commands: they parse flags and delegate.

Run as `fused-rec train` or, from the checkout, `python -m experiments.train`.

A module for each command, with the function `main`; `launch` runs it, `places` defines the flags that name files, and
`configs` has the configs that are installed. Only the chosen command's module is imported, since absl flags are defined
at import and two commands may define the same flag.

Status: 0 done; 1 the input, a flag or a file is at fault, and the last lines say which; 3 the tables are not those of
the run; 4 the tables of a finished run cannot be read; 130 stopped by SIGINT, 143 by SIGTERM; 141 the reader of the
output closed it.
"""
