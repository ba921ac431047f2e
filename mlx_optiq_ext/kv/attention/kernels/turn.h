// Vectors in shared memory, turned by a block of THREADS threads into the basis in which they are packed.

// Times the Hadamard matrix and `unit`, in place; DIM is a power of two.
template <int DIM, int THREADS, typename S>
INLINE void rotate_row(S row, float unit, int place) {
  for (int half = 1; half < DIM; half *= 2) {
    BARRIER;
    for (int i = place; i < DIM / 2; i += THREADS) {
      int low = i / half * 2 * half + i % half;
      float one = row[low], other = row[low + half];
      row[low] = one + other;
      row[low + half] = one - other;
    }
  }
  BARRIER;
  for (int i = place; i < DIM; i += THREADS) row[i] *= unit;
  BARRIER;
}

// Element `j` of a row times a matrix whose rows are DIM long.
template <int DIM, typename S, typename M>
INLINE float times_column(S row, M matrix, int j) {
  float sum = 0.0f;
  for (int i = 0; i < DIM; i++) sum += row[i] * float(matrix[i * DIM + j]);
  return sum;
}
