//! A music shop: catalogue, playlists over a junction, staff that reports to staff, invoices.

use serde_json::json;

use super::DataSet;
use super::query::{and, cmp, exists, filter, not_exists, or, related, table, through, with};

const TABLES: &str = "
    artist 6: *id name:text?
    album 9: *id title:text artist_id>artist
    genre 4: *id name:text?
    media_type 3: *id name:text?
    track 16: *id name:text album_id>album? genre_id>genre? media_type_id>media_type ms:int price:real
    playlist 5: *id name:text?
    playlist_track 14: *playlist_id>playlist *track_id>track
    employee 7: *id name:text title:text? reports_to>employee?
    customer 8: *id name:text company:text? support_rep_id>employee?
    invoice 10: *id customer_id>customer total:real city:text?
    invoice_line 16: *id invoice_id>invoice track_id>track quantity:int
";

pub(super) fn data_set() -> Result<DataSet, String> {
    let bought = || exists("id=track_id", table("invoice_line"));
    let tracks = || with(table("track"), json!({"orderBy": [["ms", "desc"], ["name", "asc"]]}));
    let queries = vec![
        ("albums with their artist and longest tracks", {
            let albums = with(table("album"), json!({"orderBy": [["title", "asc"]], "limit": 5}));
            let albums = related(albums, "artist", "artist_id=id", table("artist"));
            related(albums, "tracks", "id=album_id", with(tracks(), json!({"limit": 2})))
        }),
        ("playlists with their tracks and the tracks' albums", {
            let tracks = related(table("track"), "album", "album_id=id", table("album"));
            through(
                table("playlist"),
                "tracks",
                ("id=playlist_id", "playlist_track"),
                "track_id=id",
                tracks,
            )
        }),
        ("tracks of a genre that somebody bought, page of four", {
            let of_genre =
                exists("genre_id=id", filter(table("genre"), cmp("name", "LIKE", "%m%")));
            with(filter(tracks(), and(vec![of_genre, bought()])), json!({"limit": 4}))
        }),
        ("tracks that nobody bought and no playlist has", {
            let listed = not_exists("id=track_id", table("playlist_track"));
            let bought = not_exists("id=track_id", table("invoice_line"));
            filter(table("track"), and(vec![bought, listed]))
        }),
        ("staff without reports, or with the boss's reports", {
            let reports = related(table("employee"), "reports", "id=reports_to", table("employee"));
            let boss = related(reports, "boss", "reports_to=id", table("employee"));
            let boss_of_boss = exists(
                "reports_to=id",
                filter(table("employee"), cmp("reports_to", "IS", json!(null))),
            );
            filter(boss, or(vec![not_exists("id=reports_to", table("employee")), boss_of_boss]))
        }),
        ("artists all of whose albums have a track", {
            let empty = filter(table("album"), not_exists("id=album_id", table("track")));
            filter(table("artist"), not_exists("id=artist_id", empty))
        }),
        ("customers with invoices above two, with lines and tracks", {
            let lines = related(table("invoice_line"), "track", "track_id=id", table("track"));
            let invoices =
                with(table("invoice"), json!({"orderBy": [["total", "desc"]], "limit": 2}));
            let invoices = related(invoices, "lines", "id=invoice_id", lines);
            let large = exists("id=customer_id", filter(table("invoice"), cmp("total", ">", 2)));
            related(filter(table("customer"), large), "invoices", "id=customer_id", invoices)
        }),
        ("customers of a helper who reports to nobody, or without company", {
            let free = filter(table("employee"), cmp("reports_to", "IS", json!(null)));
            filter(
                table("customer"),
                or(vec![exists("support_rep_id=id", free), cmp("company", "IS", json!(null))]),
            )
        }),
        (
            "second page of tracks by price, nulls and ties included",
            with(
                filter(table("track"), cmp("ms", "!=", 3)),
                json!({"orderBy": [["price", "asc"], ["album_id", "desc"]], "limit": 5,
                "start": {"row": {"price": 1, "album_id": null, "id": 3}, "exclusive": true}}),
            ),
        ),
        (
            "invoices of some cities, latest first",
            with(
                filter(
                    table("invoice"),
                    or(vec![
                        cmp("city", "IN", json!(["amber", "elm"])),
                        cmp("city", "ILIKE", "AMB%"),
                    ]),
                ),
                json!({"orderBy": [["id", "desc"]], "limit": 3}),
            ),
        ),
        ("tracks sold with a track of the same album", {
            let line = |more| exists("id=track_id", filter(table("invoice_line"), more));
            let same_album =
                exists("album_id=album_id", filter(table("track"), line(cmp("quantity", ">=", 3))));
            filter(table("track"), and(vec![line(cmp("quantity", "<", 5)), same_album]))
        }),
    ];
    DataSet::new("music shop", TABLES, queries)
}
