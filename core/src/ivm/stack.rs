//! A stack that never moves what is on it: a vector of a million keys takes milliseconds to grow.

/// Elements of a piece. Tests have few, and shall have many pieces all the same.
const PIECE: usize = if cfg!(test) { 3 } else { 512 };

/// See the module.
#[derive(Debug)]
pub(super) struct Stack<T> {
    /// Full, but for the last one.
    pieces: Vec<Vec<T>>,
}

impl<T> Default for Stack<T> {
    fn default() -> Self {
        Stack { pieces: Vec::new() }
    }
}

impl<T> Stack<T> {
    pub(super) fn push(&mut self, element: T) {
        match self.pieces.last_mut() {
            Some(piece) if piece.len() < PIECE => piece.push(element),
            _ => self.pieces.push(vec![element]),
        }
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        let piece = self.pieces.last_mut()?;
        let element = piece.pop();
        if piece.is_empty() {
            self.pieces.pop();
        }
        if self.pieces.is_empty() {
            // Most are empty most of the time, and there are two per node of each query.
            self.pieces = Vec::new();
        }
        element
    }

    /// All elements, the first one first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.pieces.iter().flatten()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_in_first_out() {
        let mut stack = Stack::default();
        for round in 0..3 {
            (0..10 * round).for_each(|n| stack.push(n));
            assert_eq!(stack.is_empty(), round == 0);
            assert!(stack.iter().copied().eq(0..10 * round));
            (0..10 * round).rev().for_each(|n| assert_eq!(stack.pop(), Some(n)));
            assert_eq!(stack.pop(), None);
        }
    }
}
