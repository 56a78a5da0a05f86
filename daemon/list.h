/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Intrusive doubly linked lists: the head is a struct fq_list of its own, an
 * entry embeds one.  An entry that is in no list points at itself, so removing
 * twice does no harm.  Not synchronised.
 */
#ifndef FQ_DAEMON_LIST_H
#define FQ_DAEMON_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct fq_list {
    struct fq_list *next, *prev;
};

#define fq_list_entry(node, type, member) ((type *)((char *)(node)-offsetof(type, member)))

/* Runs the body for each node; the body may remove that node, and no other. */
#define fq_list_each(node, head)                                                                   \
    for (struct fq_list *node = (head)->next, *node##_next = node->next; node != (head);           \
         node = node##_next, node##_next = node->next)

static inline void fq_list_init(struct fq_list *list) {
    list->next = list->prev = list;
}

static inline bool fq_list_empty(const struct fq_list *list) {
    return list->next == list;
}

static inline void fq_list_append(struct fq_list *head, struct fq_list *node) {
    node->prev = head->prev;
    node->next = head;
    head->prev->next = node;
    head->prev = node;
}

static inline void fq_list_remove(struct fq_list *node) {
    node->prev->next = node->next;
    node->next->prev = node->prev;
    fq_list_init(node);
}

#endif
