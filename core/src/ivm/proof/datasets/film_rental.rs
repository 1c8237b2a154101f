//! A film rental: films with actors and categories over junctions, copies in stores, rentals,
//! payments, addresses three levels deep.

use serde_json::json;

use super::DataSet;
use super::query::{and, cmp, exists, filter, not_exists, or, related, table, through, with};

const TABLES: &str = "
    country 3: *id name:text
    city 5: *id name:text country_id>country
    address 7: *id street:text city_id>city
    language 3: *id name:text
    film 9: *id title:text language_id>language original_language_id>language? length:int? rate:real
    actor 6: *id last_name:text
    film_actor 14: *actor_id>actor *film_id>film
    category 4: *id name:text
    film_category 10: *film_id>film *category_id>category
    store 2: *id address_id>address
    inventory 12: *id film_id>film store_id>store
    customer 6: *id last_name:text store_id>store address_id>address active:bool
    rental 14: *id inventory_id>inventory customer_id>customer returned:int?
    payment 12: *id rental_id>rental? customer_id>customer amount:real
";

pub(super) fn data_set() -> Result<DataSet, String> {
    let open = || filter(table("rental"), cmp("returned", "IS", json!(null)));
    let queries = vec![
        ("films with cast and categories", {
            let films = with(
                table("film"),
                json!({"orderBy": [["title", "asc"], ["length", "desc"]], "limit": 4}),
            );
            let films = through(
                films,
                "actors",
                ("id=film_id", "film_actor"),
                "actor_id=id",
                table("actor"),
            );
            through(
                films,
                "categories",
                ("id=film_id", "film_category"),
                "category_id=id",
                table("category"),
            )
        }),
        ("films that a store has and nobody has out", {
            let out = filter(table("inventory"), exists("id=inventory_id", open()));
            let has = filter(table("inventory"), cmp("store_id", "=", 1));
            filter(
                table("film"),
                and(vec![exists("id=film_id", has), not_exists("id=film_id", out)]),
            )
        }),
        (
            "copies that are in: no open rental",
            filter(table("inventory"), not_exists("id=inventory_id", open())),
        ),
        ("customers of a country, three levels up", {
            let country = filter(table("country"), cmp("name", "ILIKE", "amber"));
            let city = filter(table("city"), exists("country_id=id", country));
            filter(
                table("customer"),
                exists("address_id=id", filter(table("address"), exists("city_id=id", city))),
            )
        }),
        ("customers with their address down to the country", {
            let city = related(table("city"), "country", "country_id=id", table("country"));
            let address = related(table("address"), "city", "city_id=id", city);
            related(
                filter(table("customer"), cmp("active", "=", true)),
                "address",
                "address_id=id",
                address,
            )
        }),
        ("late customers, the last two rentals each", {
            let rentals = with(
                table("rental"),
                json!({"orderBy": [["returned", "desc"], ["id", "desc"]], "limit": 2}),
            );
            related(
                filter(table("customer"), exists("id=customer_id", open())),
                "rentals",
                "id=customer_id",
                rentals,
            )
        }),
        ("payments without a rental, or of an inactive customer, largest first", {
            let inactive = filter(table("customer"), cmp("active", "=", false));
            let either =
                or(vec![cmp("rental_id", "IS", json!(null)), exists("customer_id=id", inactive)]);
            with(
                filter(table("payment"), either),
                json!({"orderBy": [["amount", "desc"]], "limit": 3}),
            )
        }),
        ("films in a language that is the original of another", {
            let of =
                exists("id=original_language_id", filter(table("film"), cmp("length", ">", 1)));
            let films =
                filter(table("film"), exists("language_id=id", filter(table("language"), of)));
            related(films, "language", "language_id=id", table("language"))
        }),
        ("actors without a long film in a category, second page", {
            let category = filter(table("category"), cmp("name", "NOT LIKE", "c%"));
            let junction = filter(table("film_category"), exists("category_id=id", category));
            let long = filter(
                table("film"),
                and(vec![cmp("length", ">=", 3), exists("id=film_id", junction)]),
            );
            let plays = filter(table("film_actor"), exists("film_id=id", long));
            with(
                filter(table("actor"), not_exists("id=actor_id", plays)),
                json!({"orderBy": [["last_name", "desc"]], "limit": 2, "start": {"row": {"last_name": "elm"}, "exclusive": false}}),
            )
        }),
    ];
    DataSet::new("film rental", TABLES, queries)
}
