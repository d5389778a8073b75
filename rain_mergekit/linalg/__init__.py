"""Linear algebra: tensors in, tensors out, no files and no models.

Feature rows, the projection I - U V^T, head coefficients and the merged weight (Eq. 16). Any other
package may use it; it uses `errors` and `system`.
"""
