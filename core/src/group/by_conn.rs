//! A map from connections: a group has one or a few, and a node of a tree has places for eleven.

use super::ConnId;

/// Values by connection, in the order of [`ConnId`]s, which rise: a new one is the last.
#[derive(Debug)]
pub(super) struct ByConn<T>(Vec<(ConnId, Box<T>)>);

impl<T> Default for ByConn<T> {
    fn default() -> Self {
        ByConn(Vec::new())
    }
}

impl<T> ByConn<T> {
    fn find(&self, conn: ConnId) -> Result<usize, usize> {
        self.0.binary_search_by_key(&conn, |(known, _)| *known)
    }

    pub(super) fn get(&self, conn: ConnId) -> Option<&T> {
        self.find(conn).ok().map(|at| &*self.0[at].1)
    }

    pub(super) fn get_mut(&mut self, conn: ConnId) -> Option<&mut T> {
        self.find(conn).ok().map(|at| &mut *self.0[at].1)
    }

    pub(super) fn contains(&self, conn: ConnId) -> bool {
        self.find(conn).is_ok()
    }

    pub(super) fn insert(&mut self, conn: ConnId, value: T) {
        let value = Box::new(value);
        match self.find(conn) {
            Ok(at) => self.0[at].1 = value,
            Err(at) => {
                if self.0.is_empty() {
                    self.0.reserve_exact(1);
                }
                self.0.insert(at, (conn, value));
            }
        }
    }

    pub(super) fn remove(&mut self, conn: ConnId) -> bool {
        self.find(conn).map(|at| self.0.remove(at)).is_ok()
    }

    pub(super) fn clear(&mut self) {
        self.0 = Vec::new();
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn conns(&self) -> impl Iterator<Item = ConnId> + '_ {
        self.0.iter().map(|(conn, _)| *conn)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|(_, value)| &**value)
    }

    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = (ConnId, &T)> {
        self.0.iter().map(|(conn, value)| (*conn, &**value))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (ConnId, &mut T)> {
        self.0.iter_mut().map(|(conn, value)| (*conn, &mut **value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_map_in_the_order_of_connections() {
        let mut map = ByConn::default();
        for conn in [3, 1, 7, 3] {
            map.insert(ConnId(conn), conn * 10);
        }
        assert!(map.iter().map(|(conn, value)| (conn.0, *value)).eq([(1, 10), (3, 30), (7, 70)]));
        assert!(map.remove(ConnId(3)) && !map.remove(ConnId(3)));
        *map.get_mut(ConnId(7)).unwrap() += 1;
        map.iter_mut().for_each(|(_, value)| *value += 1);
        assert_eq!((map.get(ConnId(7)), map.get(ConnId(3)), map.len()), (Some(&72), None, 2));
        assert!(map.conns().eq([ConnId(1), ConnId(7)]) && map.values().sum::<u64>() == 83);
        assert!(map.contains(ConnId(1)) && !map.is_empty());
        map.clear();
        assert!(map.is_empty());
    }
}
