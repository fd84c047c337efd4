"""Root mean square normalisation, alone and with the addition to the residual stream."""
